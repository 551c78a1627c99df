"""Making a judge: labels from the speaker itself, a probe that learns them, a threshold chosen on held-out ones."""
