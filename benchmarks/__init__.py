"""Measurements against OpenCLIP; run as modules from the root of the source tree."""
