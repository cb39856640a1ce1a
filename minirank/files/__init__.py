"""Adapters on disk: minirank's own file, and PEFT's folders both ways."""
