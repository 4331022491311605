# A short session with the demo kernel, for `make run` where there is no terminal: each command is shown, then its answer.
set pagination off
set confirm off
set width 0
set style enabled off

echo \n== Reset: before the kernel's first instruction, paging off\n
set trace-commands on
info registers eip cs cr0
set trace-commands off

echo \n== To the first system call, in ring 3\n
set trace-commands on
tbreak *system_call
continue
set trace-commands off
# Up to the INT instruction.
while *(unsigned char *) $pc != 0xcd
  stepi
end
set trace-commands on
x/i $pc
print $cs & 3
set trace-commands off

echo \n== One step through the gate, into ring 0\n
set trace-commands on
stepi
print $cs & 3
backtrace
info registers icount
set trace-commands off

echo \n== The next timer tick, by a watchpoint\n
set trace-commands on
watch ticks
continue
monitor info icount
delete
set trace-commands off

echo \n== A triple fault, asked for in the shell on COM1\n
set trace-commands on
monitor serial triple\n
continue
kill
