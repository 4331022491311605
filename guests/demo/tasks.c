/* Tasks: making them, ending them, and taking turns. All of it runs with interrupts off. */
#include "kernel.h"
#include "x86.h"

struct task tasks[TASKS]; /* [0] is the idle task */
struct task *current;
static uint32_t last_pid;

extern char library_physical[], primes_physical[]; /* kernel.ld: the library ends where the first program begins */
#define KERNEL_DIRECTORY ((uint32_t)kernel_directory - KERNEL_BASE)

/* Runs when nobody else can. Interrupts hand over from here by themselves. */
static void idle(void)
{
    yield();
    for (;;)
        wait_for_interrupt();
}

/* Take a free slot of the table and give it a kernel stack. `frame_bytes` are left free at the top of it, below them
   stands what switch_context pops: four registers (EBX last but one) and where to begin. */
static struct task *task_create(const char *name, uint32_t directory, uint32_t frame_bytes, void (*begin)(void),
                                uint32_t ebx)
{
    struct task *task = tasks;
    while (task->state != TASK_FREE) {
        if (++task == tasks + TASKS)
            panic("too many tasks");
    }
    uint32_t stack = page_allocate();
    if (stack == 0)
        panic("out of memory");
    *task = (struct task){
        .pid = last_pid++,
        .name = name,
        .state = TASK_READY,
        .stack = stack + KERNEL_BASE,
        .directory = directory,
    };
    uint32_t *top = (uint32_t *)(task->stack + PAGE_BYTES - frame_bytes);
    *--top = (uint32_t)begin;
    *--top = 0; /* ebp */
    *--top = ebx;
    *--top = 0; /* esi */
    *--top = 0; /* edi */
    task->esp = (uint32_t)top;
    return task;
}

/* True if the task has an address space of its own, and so runs in ring 3. */
bool task_is_user(const struct task *task)
{
    return task->directory != KERNEL_DIRECTORY;
}

/* A task that runs `entry` in ring 0, in the kernel's own address space, with interrupts on. */
struct task *task_create_thread(const char *name, void (*entry)(void))
{
    uint32_t flags = interrupts_off();
    struct task *task = task_create(name, KERNEL_DIRECTORY, 2 * sizeof(uint32_t), thread_begin, (uint32_t)entry);
    interrupts_restore(flags);
    return task;
}

/* A task that runs `entry` of `program` in ring 3 (its main function, if that is 0), in an address space of its own. */
struct task *task_create_user(const struct program *program, void (*entry)(void))
{
    uint32_t flags = interrupts_off();
    uint32_t directory = directory_create();
    uint32_t physical = (uint32_t)library_physical;
    uint32_t linear = LIBRARY;
    for (; physical < (uint32_t)primes_physical; physical += PAGE_BYTES, linear += PAGE_BYTES)
        page_map(directory, linear, physical, PAGE_PRESENT | PAGE_USER);

    physical = (uint32_t)program->physical;
    linear = (uint32_t)program->text;
    for (; linear < (uint32_t)program->data; physical += PAGE_BYTES, linear += PAGE_BYTES)
        page_map(directory, linear, physical, PAGE_PRESENT | PAGE_USER);
    for (; linear < (uint32_t)program->end; physical += PAGE_BYTES, linear += PAGE_BYTES) {
        uint32_t copy = page_allocate();
        if (copy == 0)
            panic("out of memory");
        memcpy(direct(copy), direct(physical), PAGE_BYTES);
        page_map(directory, linear, copy, PAGE_PRESENT | PAGE_WRITE | PAGE_USER);
    }

    struct task *task = task_create(program->name, directory, sizeof(struct trap_frame), trap_return, 0);
    struct trap_frame *frame = (struct trap_frame *)(task->stack + PAGE_BYTES) - 1;
    *frame = (struct trap_frame){
        .ebx = (uint32_t)(entry ? entry : program->entry),
        .ds = USER_DATA,
        .es = USER_DATA,
        .eip = (uint32_t)user_start,
        .cs = USER_CODE,
        .eflags = EFLAGS_IF | 0x2,
        .esp = USER_STACK_TOP,
        .ss = USER_DATA,
    };
    interrupts_restore(flags);
    return task;
}

/* Make the tasks that are there from the beginning and start taking turns; the caller's stack is abandoned. */
void tasks_init(void)
{
    task_create_thread("idle", idle);
    task_create_thread("shell", shell);
    task_create_user(&primes_program, 0);
    task_create_user(&clock_program, 0);
    *(bool *)direct((uint32_t)library_physical + ((uint32_t)&sysenter_available - LIBRARY)) = has_sysenter;
    uint32_t abandoned;
    current = tasks;
    switch_context(&abandoned, current->esp);
}

/* The next task after the current one, in the order of the table, that is ready; or else the idle task. */
static struct task *choose(void)
{
    for (int i = 1; i <= TASKS; i++) {
        struct task *task = &tasks[(current - tasks + i) % TASKS];
        if (task->state == TASK_READY && task != tasks)
            return task;
    }
    return tasks;
}

/* Give the CPU to another task, if one is ready. Returns when it is the caller's turn again. */
void schedule(void)
{
    struct task *previous = current;
    struct task *next = choose();
    if (next == previous)
        return;
    current = next;
    segments_set_kernel_stack(next->stack + PAGE_BYTES);
    if (next->directory != previous->directory)
        write_cr3(next->directory);
    switch_context(&previous->esp, next->esp);
}

/* Let the others have a turn. */
void yield(void)
{
    uint32_t flags = interrupts_off();
    schedule();
    interrupts_restore(flags);
}

/* Called at each timer tick: wake who has slept enough, and end the turn of the task that runs. */
void tasks_tick(void)
{
    current->used_ticks++;
    for (struct task *task = tasks; task < tasks + TASKS; task++) {
        if (task->state == TASK_ASLEEP && (int)(ticks - task->wake_tick) >= 0)
            task->state = TASK_READY;
    }
    schedule();
}

/* Called after other interrupts: if one has woken a task, it need not wait for the next tick. */
void tasks_end_idling(void)
{
    if (current == tasks)
        schedule();
}

/* Return `duration_ticks` timer ticks later. */
void task_sleep(uint32_t duration_ticks)
{
    uint32_t flags = interrupts_off();
    current->wake_tick = ticks + duration_ticks;
    current->state = TASK_ASLEEP;
    schedule();
    interrupts_restore(flags);
}

/* Wait until somebody calls task_wake(what). Interrupts must be off, from the moment the caller looked at `what`. */
void task_block(const volatile void *what)
{
    current->waited = what;
    current->state = TASK_WAITING;
    schedule();
}

/* Make all tasks ready that wait for `what`. */
void task_wake(const volatile void *what)
{
    for (struct task *task = tasks; task < tasks + TASKS; task++) {
        if (task->state == TASK_WAITING && task->waited == what)
            task->state = TASK_READY;
    }
}

/* End the task that runs. Its stack is still in use and stays until task_wait. */
void task_exit(int status)
{
    interrupts_off();
    current->status = status;
    current->state = TASK_ENDED;
    task_wake(current);
    schedule();
    panic("an ended task runs");
}

/* Wait for the end of `task`, free what it had, and return its status. */
int task_wait(struct task *task)
{
    uint32_t flags = interrupts_off();
    while (task->state != TASK_ENDED)
        task_block(task);
    if (task_is_user(task))
        directory_destroy(task->directory);
    page_free(task->stack - KERNEL_BASE);
    task->state = TASK_FREE;
    interrupts_restore(flags);
    return task->status;
}
