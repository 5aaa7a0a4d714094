"""Checks of one machine and of the way to one run, each with what was found and what to do about it. Changes and repairs nothing."""
