"""The experiments of the paper: the commands, and the networks, data and training that only they use."""
