"""The task's vocabulary: sample, prompt, answer, coordinate frames, metrics, dataset readers."""
