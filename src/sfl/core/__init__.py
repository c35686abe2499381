"""The algebra of a round: numpy and the standard library only."""
