"""What is in shards: python -m data.inspect"""
