/* Runs instructions one at a time on the CPU in 32-bit user mode, each from a given state, and reports what they did.
 *
 * Standard input is a file: a struct header, the segments, the initial arena, then jobs. Standard output gets an
 * outcome for each job, followed by the bytes of the arena that differ from the initial ones. The layouts have twins in usermode.py.
 *
 * The signal handler is the loop: it is entered when an instruction has trapped or faulted, reports, and returns to the
 * state of the next job. There is no C library and so nothing that needs FS, GS or a stack of the job's own. */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

enum { PAGE = 4096, CODE_PAGES = 2, MOST_ARENA_PAGES = 16, PATCHES = 2, STACK_BYTES = 65536, INT3 = 0xCC };
enum { PROT_NONE = 0, PROT_READ = 1, PROT_WRITE = 2, PROT_EXEC = 4 };
enum { MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_FIXED = 0x10, MAP_ANONYMOUS = 0x20 };
enum { SYS_exit = 1, SYS_write = 4, SYS_modify_ldt = 123, SYS_mprotect = 125, SYS_rt_sigaction = 174,
       SYS_sigaltstack = 186, SYS_mmap2 = 192, SYS_memfd_create = 356, SYS_ftruncate = 93 };
enum { SIGILL = 4, SIGTRAP = 5, SIGBUS = 7, SIGFPE = 8, SIGSEGV = 11 };
enum { SA_SIGINFO = 4, SA_ONSTACK = 0x08000000 };
enum { VECTOR_DB = 1, TF = 0x100 };

struct header {
    u32 code_linear, arena_linear, arena_pages, segments, jobs, input_bytes;
};

struct patch {
    u32 linear, length;
    u8 data[16];
};

struct job {
    u32 gpr[8]; /* EAX ECX EDX EBX ESP EBP ESI EDI */
    u32 eip, eflags;
    u16 selectors[6]; /* ES CS SS DS FS GS */
    u32 iterations;   /* go on while EIP stands still, so many times at most */
    u32 code_linear;
    u8 code[16];
    u8 code_protection[CODE_PAGES], unused[2];
    struct patch patches[PATCHES];
    u8 protection[]; /* of each page of the arena */
};

struct outcome {
    u32 gpr[8];
    u32 eip, eflags;
    u16 selectors[6];
    u32 vector, error_code, cr2, changes;
};

/* The kernel's frame for a 32-bit process: struct ucontext_ia32 up to the signal mask. */
struct context {
    u32 flags, link, stack[3];
    u16 gs, gsh, fs, fsh, es, esh, ds, dsh;
    u32 di, si, bp, sp, bx, dx, cx, ax, trapno, err, ip;
    u16 cs, csh;
    u32 eflags, sp_at_signal;
    u16 ss, ssh;
    u32 fpstate, oldmask, cr2;
};

static const struct header *header;
static const u8 *pristine;
static const struct job *job, *next_job;
static u32 jobs_left, iterations_left, job_bytes;
static u8 *code_alias, *code, *arena;
static u8 protection_now[MOST_ARENA_PAGES], code_protection_now[CODE_PAGES];
static u8 stack[STACK_BYTES] __attribute__((aligned(16)));
static u8 output[1 << 19];
static u32 output_used;

static u32 call(u32 number, u32 a, u32 b, u32 c, u32 d, u32 e, u32 f) {
    u32 result, arguments[2] = {number, f};
    __asm__ volatile("push %%ebp\n mov 4(%%eax), %%ebp\n mov (%%eax), %%eax\n int $0x80\n pop %%ebp"
                     : "=a"(result)
                     : "a"(arguments), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
                     : "memory");
    return result;
}

static __attribute__((noreturn)) void leave(u32 status) {
    for (;;)
        call(SYS_exit, status, 0, 0, 0, 0, 0);
}

static void need(int holds, u32 status) {
    if (!holds)
        leave(status);
}

static void copy(void *to, const void *from, u32 length) {
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
}

static void fill(void *to, u8 byte, u32 length) {
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(byte) : "memory");
}

static void flush(void) {
    for (u32 done = 0; done < output_used;) {
        int count = (int)call(SYS_write, 1, (u32)(output + done), output_used - done, 0, 0, 0);
        need(count > 0, 10);
        done += (u32)count;
    }
    output_used = 0;
}

static void put(const void *data, u32 length) {
    need(length <= sizeof output, 9);
    if (output_used + length > sizeof output)
        flush();
    copy(output + output_used, data, length);
    output_used += length;
}

static void protect(u32 linear, u8 *now, u8 wanted) {
    if (*now != wanted) {
        need(call(SYS_mprotect, linear, PAGE, wanted, 0, 0, 0) == 0, 11);
        *now = wanted;
    }
}

static void report(const struct context *c) {
    struct outcome o = {{c->ax, c->cx, c->dx, c->bx, c->sp_at_signal, c->bp, c->si, c->di}, c->ip, c->eflags,
                        {c->es, c->cs, c->ss, c->ds, c->fs, c->gs}, c->trapno, c->err, c->cr2, 0};
    for (u32 page = 0; page < header->arena_pages; page++)
        protect(header->arena_linear + page * PAGE, &protection_now[page], PROT_READ | PROT_WRITE);
    static u32 changes[MOST_ARENA_PAGES * PAGE];
    u32 bytes = header->arena_pages * PAGE;
    for (u32 i = 0; i < bytes; i += 4) {
        if (*(const u32 *)(arena + i) == *(const u32 *)(pristine + i))
            continue;
        for (u32 j = i; j < i + 4; j++) {
            if (arena[j] != pristine[j]) {
                changes[o.changes++] = j << 8 | arena[j];
                arena[j] = pristine[j];
            }
        }
    }
    put(&o, sizeof o);
    put(changes, o.changes * sizeof changes[0]);
}

static void load(struct context *c) {
    job = next_job;
    next_job = (const struct job *)((const u8 *)job + job_bytes);
    iterations_left = job->iterations;
    if (code != 0)
        fill(code, INT3, sizeof job->code);
    code = code_alias + (job->code_linear - header->code_linear);
    copy(code, job->code, sizeof job->code);
    for (u32 i = 0; i < PATCHES; i++)
        copy((void *)job->patches[i].linear, job->patches[i].data, job->patches[i].length);
    for (u32 page = 0; page < header->arena_pages; page++)
        protect(header->arena_linear + page * PAGE, &protection_now[page], job->protection[page]);
    for (u32 page = 0; page < CODE_PAGES; page++)
        protect(header->code_linear + page * PAGE, &code_protection_now[page], job->code_protection[page]);
    c->ax = job->gpr[0], c->cx = job->gpr[1], c->dx = job->gpr[2], c->bx = job->gpr[3];
    c->sp = job->gpr[4], c->bp = job->gpr[5], c->si = job->gpr[6], c->di = job->gpr[7];
    c->ip = job->eip, c->eflags = job->eflags;
    c->es = job->selectors[0], c->cs = job->selectors[1], c->ss = job->selectors[2];
    c->ds = job->selectors[3], c->fs = job->selectors[4], c->gs = job->selectors[5];
}

__attribute__((used)) static void on_signal(int number, void *info, struct context *c) {
    (void)number, (void)info;
    if (job != 0) {
        if (c->trapno == VECTOR_DB && c->ip == job->eip && iterations_left > 1) {
            iterations_left--;
            return;
        }
        report(c);
    }
    if (jobs_left-- == 0) {
        flush();
        leave(0);
    }
    load(c);
}

/* AC, NT and ID outlive the kernel's change to the handler and back; clear them before anything is touched. */
void entry(void);
__asm__("entry:\n push $2\n popf\n jmp on_signal\n");

__attribute__((used)) static void start(void) {
    header = (const struct header *)call(SYS_mmap2, 0, PAGE, PROT_READ, MAP_PRIVATE, 0, 0);
    need((u32)header < 0xFFFFF000, 1);
    header = (const struct header *)call(SYS_mmap2, 0, header->input_bytes, PROT_READ, MAP_PRIVATE, 0, 0);
    need((u32)header < 0xFFFFF000 && header->arena_pages <= MOST_ARENA_PAGES, 2);
    const u8 *at = (const u8 *)(header + 1);
    for (u32 i = 0; i < header->segments; i++, at += 16)
        need(call(SYS_modify_ldt, 17, (u32)at, 16, 0, 0, 0) == 0, 3);
    pristine = at;
    next_job = (const struct job *)(at + header->arena_pages * PAGE);
    jobs_left = header->jobs;
    job_bytes = sizeof *job + header->arena_pages;
    job_bytes = (job_bytes + 3) & ~3u;

    u32 fd = call(SYS_memfd_create, (u32) "code", 0, 0, 0, 0, 0);
    need(call(SYS_ftruncate, fd, CODE_PAGES * PAGE, 0, 0, 0, 0) == 0, 4);
    code_alias = (u8 *)call(SYS_mmap2, 0, CODE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    u32 seen = call(SYS_mmap2, header->code_linear, CODE_PAGES * PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
    need(seen == header->code_linear, 5);
    arena = (u8 *)call(SYS_mmap2, header->arena_linear, header->arena_pages * PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, (u32)-1, 0);
    need((u32)arena == header->arena_linear, 6);
    copy(arena, pristine, header->arena_pages * PAGE);
    fill(code_alias, INT3, CODE_PAGES * PAGE);
    for (u32 page = 0; page < header->arena_pages; page++)
        protection_now[page] = PROT_READ | PROT_WRITE;
    code_protection_now[0] = code_protection_now[1] = PROT_READ;

    u32 alternate[3] = {(u32)stack, 0, sizeof stack};
    need(call(SYS_sigaltstack, (u32)alternate, 0, 0, 0, 0, 0) == 0, 7);
    static const u8 signals[] = {SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV};
    for (u32 i = 0; i < sizeof signals; i++) {
        u32 action[5] = {(u32)entry, SA_SIGINFO | SA_ONSTACK, 0, 0, 0};
        need(call(SYS_rt_sigaction, signals[i], (u32)action, 0, 8, 0, 0) == 0, 8);
    }
    __asm__ volatile("ud2");
}

void _start(void);
__asm__(".globl _start\n_start:\n and $-16, %esp\n call start\n hlt\n");
