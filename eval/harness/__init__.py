"""One evaluation from model to answers: settings, requests, answer journal and models.

Grading, tables and plots do not belong here.
"""
