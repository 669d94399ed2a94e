"""Evaluate: two sets of clips in, numbers with their protocols out.

evaluate      the comparison: guards, halves, floors, temporal controls
protocol      how a video becomes what a network sees; the protocols of papers
clips         the videos of one side
extractors    networks that turn clips into features
features      features and measures of every clip, cached, in processes or on a cluster
metrics       distances of sets of features, and measures of images and clips
tinyworld     the judge of the tiny world, for features and captions
judge_training  trains it, or that of a user's world
report        a table, JSON, a page
markup        pieces of the HTML pages
study         a blind study with people: what is shown to whom, and their votes
study_server  its page
study_report  what the votes say
"""
