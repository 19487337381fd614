"""What a reward is, what runs rewards, and the router. Rewards that ship are in `unidiff.scorers`."""
