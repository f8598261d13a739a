"""Learning: data, packing, corruption, objective, optimisers, the trainer."""
