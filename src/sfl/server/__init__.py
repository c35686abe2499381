"""What runs on the server: the loop, aggregation rules, algorithms."""
