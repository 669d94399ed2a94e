"""Serve: videos over HTTP, by a queue that loses no job.

request       what a client asks for; refused before it is queued
jobs          the queue, in SQLite or PostgreSQL
results       where videos and drafts lie: a folder, or any fsspec URL
uploads       images and videos of clients
decoding      the process that decodes them
generation    one batch of jobs: phase after phase, each stored
previews      pictures of the frames so far
worker        takes jobs, holds models in memory
app           the endpoints of /v1/videos, events, the page
doors         keys, sizes, origins, headers
statistics    what /metrics tells
server        one command: the server, and workers that are started again when they die

Servers and workers share nothing but the database and the results, so they may be on several machines.
"""
