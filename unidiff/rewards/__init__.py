"""The reward interface, the reward runner, and the router. Rewards that ship are in `unidiff.scorers`."""
