"""From paired results to a decision: may the candidate replace the baseline?"""
