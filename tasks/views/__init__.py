"""What people look at, from a run's tables alone: inspect, trace, rounds, report, charts, compare, texts; a student's card, a
run's summary and the figures for trackers.
"""
