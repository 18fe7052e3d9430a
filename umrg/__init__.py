"""The task vocabulary: sample, prompt, answer, coordinate frames, metrics, dataset readers, phantoms."""
