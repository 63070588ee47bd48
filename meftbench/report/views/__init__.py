"""Tables of a run or several, by what they answer: results in, text and numbers out."""
