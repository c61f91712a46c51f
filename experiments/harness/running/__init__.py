"""Run trials in processes or on Ray, each once; an interrupted run resumes."""
