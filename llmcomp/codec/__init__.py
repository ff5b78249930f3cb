"""Files <-> archives: windows, segments, the container format, salvage. Here data, models and coding meet."""
