"""llmcomp inside other libraries, each an optional extra: a Trainer's callback, a model of the evaluation harness."""
