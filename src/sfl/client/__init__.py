"""What runs on a site."""
