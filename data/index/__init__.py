"""Which tars a path means, and where each sample lies in them: python -m data.index"""
