"""A real language model trained by three daemons, against training alone."""
