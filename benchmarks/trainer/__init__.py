"""The trainer against a loop that somebody writes by hand."""
