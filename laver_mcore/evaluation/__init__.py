"""Exported LaVer models under lmms-eval and VLMEvalKit."""
