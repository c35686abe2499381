"""SFL over Flower's Message API: its simulation on Ray, and SuperLink with SuperNodes."""
