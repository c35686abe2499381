"""Local training; the only home of torch outside the applications."""
