"""What the rows of a round are: where their prompts come from, which rows a round has, how an answer is graded."""
