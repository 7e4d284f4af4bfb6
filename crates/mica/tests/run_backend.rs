//! A guest of `mica run` whose disk another process serves does not notice that this process is
//! killed and started again while it writes.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/images.rs"]
mod images;
#[path = "support/lab.rs"]
mod lab;

use lab::{BOOT, Host, PROMPT, STEP};

/// Each round fills one eighth of the disk with new random bytes and reads them back. Words that are
/// waited for are in quotes, so that the echo of what was typed does not look like output.
const ROUNDS: &str = "r=0; while ! [ -e stop ]; do s=$((r % 8)); \
     dd if=/dev/urandom of=a$s bs=64k count=16 2>/dev/null; \
     dd if=a$s of=/dev/vda bs=64k seek=$((s * 16)) oflag=direct conv=notrunc,fsync 2>/dev/null \
     && dd if=/dev/vda bs=64k skip=$((s * 16)) count=16 iflag=direct 2>/dev/null | cmp - a$s \
     || echo fai''led; r=$((r + 1)); echo rou''nd $r; done &";

/// The disk holds what was written to it, and the kernel complained of nothing.
const VERIFY: &str = "touch stop; wait; blockdev --flushbufs /dev/vda; \
     cat a? | cmp - /dev/vda && ! dmesg | grep vda.*error && echo veri''fied";

struct Test {
    host: Host,
    kills: u32,
}

impl Test {
    /// Types a line at the guest's prompt.
    fn type_line(&mut self, line: &str) {
        self.host.shell(&format!("cat >&9 <<'EOF'\n{line}\nEOF\n:"));
    }

    fn start_exporter(&mut self) {
        let export = "mica storage export disk --vhost-user disk.sock";
        self.host
            .begin(&format!("{export} >export 2>&1 & exporter=$!"));
        self.host.status(STEP);
        self.host.until("grep -q vhost-user-blk export");
    }

    /// Kills the exporter and waits until the machine has noticed.
    fn kill_exporter(&mut self) {
        self.host.begin("kill -9 $exporter; wait $exporter");
        assert_eq!(self.host.status(STEP).0, 128 + 9);
        self.kills += 1;
        self.until_events("disk0 lost its backend");
    }

    /// Waits until as many events of a kind have come as there were kills.
    fn until_events(&mut self, event: &str) {
        let count = format!("[ $(grep -c '{event}' events) = {} ]", self.kills);
        self.host.until(&count);
    }

    /// Waits until the guest has done some more rounds.
    fn until_rounds(&mut self, more: u64) {
        let count = "grep -c 'round [0-9]' console";
        let done: u64 = self.host.run(count).1.trim().parse().unwrap();
        self.host
            .until(&format!("[ $({count}) -ge {} ]", done + more));
    }
}

#[test]
fn a_guest_does_not_notice_that_its_backend_is_killed() {
    let mut test = Test {
        host: Host::start(|lab| lab),
        kills: 0,
    };
    test.host.shell("truncate -s 8M disk; mkfifo in");
    test.start_exporter();
    let run = "mica run tiny -c 2 --disk vhost-user:disk.sock";
    test.host
        .begin(&format!("{run} <in >console 2>events & mica=$!; exec 9>in"));
    test.host.status(STEP);
    test.host.until(&format!("grep -q '{PROMPT}' console"));
    test.type_line(&format!("cd /tmp\n{ROUNDS}"));
    test.until_rounds(8);
    for pause in [false, true] {
        test.kill_exporter();
        // Without its backend, too, the machine answers, stands still and goes on.
        if pause {
            test.host.shell("mica vm pause tiny");
        }
        let state = test.host.shell("mica vm state tiny");
        assert!(
            state.contains(if pause { "paused" } else { "running" }),
            "{state}"
        );
        if pause {
            test.host.shell("mica vm resume tiny");
        }
        test.start_exporter();
        test.until_events("disk0 has a backend again");
        test.until_rounds(3);
    }
    test.type_line(VERIFY);
    test.host.until("grep -q '^verified' console");
    test.type_line("poweroff");
    test.host.begin("wait $mica");
    let status = test.host.status(BOOT).0;
    let said = test.host.shell("cat events console");
    assert_eq!(status, 0, "{said}");
    assert!(!said.contains("failed"), "{said}");
    test.host.finish();
}
