"""Whether a number is real and whether a difference means anything: verify and compare. No fitting, no drawing."""
