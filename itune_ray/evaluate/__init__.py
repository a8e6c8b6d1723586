"""Scoring models: eval actors ask the engine pools, graders grade, statistics say how sure a score is."""
