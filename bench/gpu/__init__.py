"""What a GPU's driver and link take, and how fast mball streams to it.

[Note: parts]
The whole has nine minutes, on a machine that is there for minutes only. So each part runs in processes of its own and
within a limit of its own, its figures are written as soon as they are there, and each can be run alone:
`make gpu-bench ARGS="-k decode"`. Parts of one result are brought together by `keep`, if they are of one day, one
machine and one commit.

[Note: clocks]
Times are the host's, from a synchronised GPU to a synchronised GPU; calls of the driver take host time and no more.
"""
