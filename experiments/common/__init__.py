"""What the experiments share; here what all of them do: records, studies, pictures."""
