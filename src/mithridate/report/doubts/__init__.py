"""The report doubts itself: what in the results is not trustworthy, rule by rule."""
