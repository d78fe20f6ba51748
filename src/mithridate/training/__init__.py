"""A model that learns: the step, the learner, its burn-in, its past, its checkpoints."""
