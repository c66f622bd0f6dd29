"""From rollouts to a checkpoint."""
