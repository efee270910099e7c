"""Ray on this machine and on others: sessions, tokens, the head, the doctor."""
