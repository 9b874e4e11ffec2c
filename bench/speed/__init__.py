"""How fast mball streams, against the disk, against everything resident, and against other ways to run the model.

[Note: words]
A *contender* is a process that runs one way of running the model, or reads as the yardstick does. A *burst* is some
steps of a workload, after warming steps that are not timed; what a contender still reads ahead then ends before its
reply, so that contenders never disturb each other. A *round* is one burst of each contender, in turn. Ratios are of
bursts of the same round.
"""
