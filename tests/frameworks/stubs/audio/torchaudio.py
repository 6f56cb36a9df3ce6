"""Stands in for torchaudio, which is imported and, without audio, not called. It loads on no CPU build of torch."""
