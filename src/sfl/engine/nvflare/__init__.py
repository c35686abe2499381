"""SFL over NVIDIA FLARE: a controller that is our engine, and an executor that is our sites."""
