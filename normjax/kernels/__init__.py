"""Operations with a form for each machine, chosen when a program is lowered."""
