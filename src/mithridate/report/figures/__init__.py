"""The figures of a report, one file a figure. Drawn without pyplot or a screen."""
