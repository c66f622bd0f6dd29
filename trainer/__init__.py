"""Makes length value models: rollouts, training, evaluation."""
