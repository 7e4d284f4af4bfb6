//! `mica vm` against a running guest, and what the jail of its VM process looks like from outside.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/images.rs"]
mod images;
#[path = "support/lab.rs"]
mod lab;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use lab::{BOOT, Host, STEP};
use serde_json::{Value, json};

/// Names the control socket to the copy of this program in the lab; unset elsewhere.
const SOCKET: &str = "MICA_TEST_SOCKET";

/// Starts the tiny guest in the background. What is written to descriptor 9 is typed at its prompt.
fn start(host: &mut Host) {
    host.shell("mkfifo in");
    host.begin("mica run tiny -c 2 -m 320M <in >console 2>events & mica=$!; exec 9>in");
    assert_eq!(host.status(STEP).0, 0);
    host.until("grep -q 'tiny# ' console");
}

/// Runs a line at the guest's prompt and returns its output.
fn guest(host: &mut Host, line: &str) -> String {
    host.shell(&format!("echo '{line}; echo do\"\"ne' >&9"));
    host.until("grep -q '^done' console");
    let console = host.shell("cat console; : >console");
    // Behind the echo of what was typed.
    let (_, output) = console.split_once("do\"\"ne\r\n").unwrap();
    output.split_once("done").unwrap().0.to_owned()
}

fn state(host: &mut Host) -> Value {
    serde_json::from_str(&host.shell("mica -o json vm state tiny")).unwrap()
}

fn counter(host: &mut Host, name: &str) -> u64 {
    let counters = host.shell("mica -o json vm counters tiny");
    let counters: Value = serde_json::from_str(&counters).unwrap();
    counters["counters"][name]
        .as_u64()
        .unwrap_or_else(|| panic!("{name}: {counters}"))
}

fn shows_its_state(host: &mut Host) {
    let list = host.shell("mica vm list");
    let line = list.lines().find(|line| line.starts_with("tiny ")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[1..4], ["running", "2", "320M"], "{list}");
    let state = state(host);
    for (name, value) in [
        ("state", Value::from("running")),
        ("vcpus", 2.into()),
        ("memory", (320 << 20).into()),
        ("engine", "kvm".into()),
        ("cpu_profile", "x86-64-v2".into()),
    ] {
        assert_eq!(state[name], value, "{name}: {state}");
    }
    assert_eq!(state["pid"].to_string(), words[4]);
    let (status, output) = host.run("mica run tiny --name tiny");
    assert_eq!(status, 1, "{output}");
    assert!(output.contains("a VM called 'tiny' is running"), "{output}");
    let (status, output) = host.run("mica vm state nobody");
    assert_eq!(status, 1, "{output}");
    assert!(output.contains("no VM answers at"), "{output}");
}

/// The VM process has its own user, cannot gain rights, and holds nothing open beyond its machine.
fn is_jailed(host: &mut Host) {
    let pid = state(host)["pid"].to_string();
    let status = host.shell(&format!("cat /proc/{pid}/status"));
    let field = |name: &str| -> Vec<String> {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).map(str::to_owned).collect()
    };
    assert_eq!(field("Seccomp:"), ["2"], "{status}");
    assert_eq!(field("NoNewPrivs:"), ["1"], "{status}");
    assert_eq!(field("CapEff:"), ["0000000000000000"], "{status}");
    assert_eq!(field("CapPrm:"), ["0000000000000000"], "{status}");
    for ids in [field("Uid:"), field("Gid:")] {
        assert!(ids[0].parse::<u32>().unwrap() > 2_000_000_000, "{status}");
        assert!(ids.iter().all(|id| *id == ids[0]), "{status}");
    }
    assert!(field("Groups:").is_empty(), "{status}");
    for thread in host
        .shell(&format!("cat /proc/{pid}/task/*/status | grep Seccomp:"))
        .lines()
    {
        assert!(thread.ends_with('2'), "{thread}");
    }
    let open = host.shell(&format!(
        "for fd in /proc/{pid}/fd/*; do readlink $fd; done"
    ));
    for target in open.lines() {
        let known = ["socket:", "anon_inode:", "/memfd:"]
            .iter()
            .any(|kind| target.starts_with(kind));
        // Its messages go where its supervisor's do; kernel and initrd are read again at a reset.
        let named = ["/dev/null", "/tmp/events", "/dev/kvm"].contains(&target)
            || target.ends_with("/vmlinux")
            || target.ends_with("/initrd");
        assert!(known || named, "{open}");
    }
}

/// The guest gives memory up and gets it back.
fn has_a_balloon(host: &mut Host) {
    let free = |host: &mut Host| -> i64 {
        let output = guest(host, "grep MemFree /proc/meminfo");
        let kib = output.split_whitespace().nth(1).unwrap();
        kib.parse::<i64>().unwrap() * 1024
    };
    let before = free(host);
    assert_eq!(counter(host, "balloon0.actual_bytes"), 0);
    for bytes in [64 << 20, 0] {
        host.shell(&format!("mica vm balloon tiny {}K", bytes >> 10));
        assert_eq!(counter(host, "balloon0.target_bytes"), bytes);
        host.until(&format!(
            "mica vm counters tiny | grep -q 'balloon0.actual_bytes *{bytes}$'"
        ));
        let after = free(host);
        let away = before - after - i64::try_from(bytes).unwrap();
        // The guest does other things with its memory meanwhile.
        assert!(away.abs() < 16 << 20, "{before} to {after}");
    }
}

/// A paused guest does nothing, a resumed one goes on.
fn pauses_and_resumes(host: &mut Host) {
    let ticks = |host: &mut Host| -> u64 {
        let count = host.run("grep -c tick console").1;
        count.trim().parse().unwrap()
    };
    host.shell("echo 'while :; do echo tick; usleep 50000; done &' >&9");
    host.until("[ $(grep -c tick console) -gt 5 ]");
    for _ in 0..2 {
        host.shell("mica vm pause tiny");
        assert_eq!(state(host)["state"], "paused");
    }
    // What the guest had printed before is on its way for a moment.
    host.shell("sleep 1");
    let paused = ticks(host);
    host.shell("sleep 2");
    assert_eq!(ticks(host), paused, "the guest runs while it is paused");
    for _ in 0..2 {
        host.shell("mica vm resume tiny");
        assert_eq!(state(host)["state"], "running");
    }
    host.until(&format!("[ $(grep -c tick console) -gt {} ]", paused + 5));
}

/// A reset boots anew; the power button ends the guest in order.
fn resets_and_shuts_down(host: &mut Host) {
    assert_eq!(counter(host, "resets"), 0);
    host.shell(": >console; mica vm reset tiny");
    assert_eq!(counter(host, "resets"), 1);
    host.until("grep -q 'tiny# ' console");
    host.shell("mica vm power-button tiny");
    host.begin("wait $mica");
    let status = host.status(BOOT).0;
    let events = host.shell("exec 9>&-; rm in; cat events");
    assert_eq!(status, 0, "{events}");
    for said in [
        "tiny is paused",
        "tiny reboots on request",
        "tiny powered off",
    ] {
        assert!(events.contains(said), "{said}: {events}");
    }
}

/// A stop is a pulled plug, and nothing stays behind.
fn stops(host: &mut Host) {
    host.begin("mica run tiny --vsock 5 </dev/null >console 2>events & mica=$!");
    host.status(STEP);
    host.until("mica vm state tiny >state 2>&1");
    host.shell("mica vm pause tiny; mica vm stop tiny");
    host.begin("wait $mica");
    let status = host.status(STEP).0;
    let events = host.shell("cat events");
    assert_eq!(status, 3, "{events}");
    assert!(events.contains("tiny was stopped"), "{events}");
    assert_eq!(host.shell("ls /run/mica"), "kvm-probe.json\n");
    assert_eq!(host.shell("mica vm list").lines().count(), 1);
}

/// Supervisor and VM process do not outlive each other, whatever ends one of them.
fn dies_as_one(host: &mut Host) {
    let start = "mica run tiny </dev/null >console 2>events & mica=$!";
    let pid = "sed -n 's/^process *//p' state";
    host.begin(start);
    host.status(STEP);
    host.until("mica vm state tiny >state 2>&1");
    host.begin(&format!("kill -9 $({pid}); wait $mica"));
    let status = host.status(STEP).0;
    let events = host.shell("cat events");
    assert_eq!(status, 1, "{events}");
    assert!(
        events.contains("of 'tiny' ended without a word"),
        "{events}"
    );

    host.begin(start);
    host.status(STEP);
    host.until("mica vm state tiny >state 2>&1");
    host.begin("kill -9 $mica; wait $mica");
    assert_eq!(host.status(STEP).0, 128 + 9);
    host.until(&format!("! [ -e /proc/$({pid}) ]"));
    // Its socket is still there; nobody is misled by it.
    assert_eq!(host.shell("mica vm list").lines().count(), 1);
    let (status, output) = host.run("mica vm state tiny");
    assert_eq!(status, 1, "{output}");
}

/// A connection that says whatever it likes.
struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(STEP)).unwrap();
        stream.set_write_timeout(Some(STEP)).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    /// The next line; `None` at the end.
    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        let read = match self.stream.read_line(&mut line) {
            // Closed with something of ours unread.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            read => read.unwrap(),
        };
        (read > 0).then(|| serde_json::from_str(&line).unwrap())
    }

    fn greeted(path: &Path) -> Self {
        let mut client = Self::connect(path);
        let greeting = client.line().unwrap();
        assert_eq!(greeting, json!({"mica-control": 1, "name": "tiny"}));
        client
    }

    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }
}

/// The client's side in the lab; a test that does nothing where there is no socket.
#[test]
fn clients_do_what_they_should_not() {
    let Some(path) = std::env::var_os(SOCKET) else {
        return;
    };
    let path = Path::new(&path);
    wrong_requests_are_answered(path);
    too_many_and_too_much_is_cut_off(path);
}

fn wrong_requests_are_answered(path: &Path) {
    let mut client = Client::greeted(path);
    for (line, id) in [
        (&b"{\"id\":7,\"do\":\"fly\"}"[..], json!(7)),
        (b"{\"id\":8}", json!(8)),
        (b"{\"id\":9,\"do\":\"balloon\"}", json!(9)),
        (b"{\"id\":10,\"do\":\"balloon\",\"target\":-1}", json!(10)),
        (b"{\"id\":-1,\"do\":\"state\"}", Value::Null),
        (b"", Value::Null),
        (b"[[[[[[", Value::Null),
        (b"\xff\xfe\x00", Value::Null),
    ] {
        client.send(&[line, b"\n"].concat()).unwrap();
        let answer = client.line().unwrap();
        assert_eq!(answer["id"], id, "{answer}");
        assert_eq!(answer["error"]["code"], "bad-request", "{answer}");
    }
    // Several at once are answered in order, and what is not known is no matter.
    client
        .send(b"{\"id\":1,\"do\":\"state\",\"new\":{}}\n{\"id\":2,\"do\":\"counters\"}\n")
        .unwrap();
    assert_eq!(client.line().unwrap()["ok"]["state"], "running");
    let counters = client.line().unwrap();
    assert_eq!(counters["id"], 2);
    assert!(counters["ok"]["counters"].is_object(), "{counters}");
}

fn too_many_and_too_much_is_cut_off(path: &Path) {
    let mut client = Client::greeted(path);
    // The process may hang up before it has taken everything.
    let _ = client.send(&[b' '; 70_000]);
    assert_eq!(client.line().unwrap()["error"]["code"], "too-long");
    assert_eq!(client.line(), None);

    let mut clients: Vec<Client> = (0..16).map(|_| Client::greeted(path)).collect();
    assert_eq!(Client::connect(path).line(), None, "a client too many");
    // One that asks and never listens is thrown out, and nobody else has to wait for it.
    let deaf = clients.last_mut().unwrap();
    let deadline = Instant::now() + STEP;
    while deaf.send(b"{\"do\":\"counters\"}\n").is_ok() {
        assert!(Instant::now() < deadline, "a deaf client is kept");
    }
    let heard = &mut clients[0];
    heard.send(b"{\"do\":\"state\"}\n").unwrap();
    assert_eq!(heard.line().unwrap()["ok"]["state"], "running");
    let mut unread = Vec::new();
    let _ = clients.pop().unwrap().stream.read_to_end(&mut unread);
    Client::greeted(path);
}

fn bears_its_clients(host: &mut Host) {
    let output = host.shell(&format!(
        "{SOCKET}=/run/mica/tiny.sock clients --exact clients_do_what_they_should_not"
    ));
    assert!(output.contains("1 passed"), "{output}");
}

#[test]
fn a_running_guest_obeys_mica_vm() {
    let this = std::env::current_exe().unwrap();
    let mut host = Host::start(|lab| lab.file(this, "/usr/bin/clients"));
    start(&mut host);
    for part in [
        shows_its_state,
        bears_its_clients,
        is_jailed,
        has_a_balloon,
        pauses_and_resumes,
        resets_and_shuts_down,
        dies_as_one,
        stops,
    ] {
        part(&mut host);
    }
    host.finish();
}
