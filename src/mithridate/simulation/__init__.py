"""Learning under attack, simulated: online streams and federations."""
