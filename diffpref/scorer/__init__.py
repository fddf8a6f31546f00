"""The CLIP preference scorer: which of these pictures is better?"""
