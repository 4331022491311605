/* Processes: their table, who runs next, fork, exit and wait. The kernel runs with interrupts off throughout; process 0 is
   kernel_main, which only waits. */
#include "kernel.h"

#define PROCESSES 16

enum state { FREE, READY, WAITING, ENDED };

struct process {
    enum state state;
    uint32_t pid, status;
    struct process *parent;
    uint32_t directory;
    uint32_t stack; /* the kernel's, one page */
    uint32_t esp;   /* while another process runs */
};

static struct process processes[PROCESSES] = {{.state = READY}};
static struct process *current = processes;
static uint32_t last_pid;

uint32_t process_pid(void)
{
    return current->pid;
}

uint32_t process_directory(void)
{
    return current->directory;
}

/* A child of the current process that resumes what `frame` says. */
static struct process *create(uint32_t directory, const struct frame *frame)
{
    struct process *process = processes;
    while (process->state != FREE) {
        if (++process == processes + PROCESSES)
            fail("too many processes", PROCESSES);
    }
    uint32_t stack = frame_allocate();
    struct frame *copy = (struct frame *)(stack + PAGE_BYTES) - 1;
    *copy = *frame;
    copy->eax = 0;
    uint32_t *top = (uint32_t *)copy;
    *--top = (uint32_t)trap_return;
    top -= 4; /* EBP, EBX, ESI, EDI: trap_return loads them */
    *process = (struct process){
        .state = READY,
        .pid = ++last_pid,
        .parent = current,
        .directory = directory,
        .stack = stack,
        .esp = (uint32_t)top,
    };
    return process;
}

/* Give the CPU to the next process that is ready; returns when it is the caller's turn again. */
static void schedule(void)
{
    struct process *next = current;
    do {
        if (++next == processes + PROCESSES)
            next = processes;
        if (next == current && next->state != READY)
            fail("nobody can run", current->pid);
    } while (next->state != READY);
    if (next == current)
        return;
    struct process *previous = current;
    current = next;
    counts.switches++;
    set_kernel_stack(next->stack + PAGE_BYTES);
    load_cr3(next->directory ? next->directory : (uint32_t)kernel_directory);
    switch_context(&previous->esp, next->esp);
}

/* Let the others have a turn. */
void yield(void)
{
    schedule();
}

/* Start the program in ring 3, as a child: it calls its function number `workload` with `count`. */
void process_run(uint32_t workload, uint32_t count)
{
    extern void user_main(uint32_t, uint32_t);
    uint32_t arguments[3] = {0, workload, count};
    uint32_t directory = space_create();
    struct frame frame = {
        .ds = USER_DATA,
        .es = USER_DATA,
        .vector = SYSTEM_CALL_VECTOR,
        .eip = (uint32_t)user_main,
        .cs = USER_CODE,
        .eflags = EFLAGS_IF | 2,
        .esp = space_load_program(directory, arguments),
        .ss = USER_DATA,
    };
    create(directory, &frame);
}

uint32_t process_fork(const struct frame *frame)
{
    counts.forks++;
    uint32_t directory = space_copy(current->directory);
    struct process *child = create(directory, frame);
    load_cr3(current->directory); /* our own pages are read-only now */
    return child->pid;
}

void process_exit(uint32_t status)
{
    counts.exits++;
    current->status = status;
    current->state = ENDED;
    if (current->parent->state == WAITING)
        current->parent->state = READY;
    schedule();
    fail("an ended process runs", current->pid);
}

static struct process *find_ended_child(void)
{
    bool any = false;
    for (struct process *process = processes; process < processes + PROCESSES; process++) {
        if (process->state == FREE || process->parent != current)
            continue;
        any = true;
        if (process->state == ENDED)
            return process;
    }
    if (!any)
        fail("no child to wait for", current->pid);
    return 0;
}

/* Wait for the end of a child, give back what it had, and return its status. */
uint32_t process_wait(void)
{
    struct process *child;
    counts.waits++;
    while (!(child = find_ended_child())) {
        current->state = WAITING;
        schedule();
    }
    space_destroy(child->directory);
    frame_release(child->stack);
    child->state = FREE;
    return child->status;
}
