"""Meta-training of the encoder of users: every person is a task, few of their choices the support, others the query."""
