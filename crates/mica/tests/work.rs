//! Programs that compute, inside stock Debian on the processor in software. Each checks its own results.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/console.rs"]
mod console;
#[path = "support/images.rs"]
mod images;
#[path = "support/place.rs"]
mod place;

use std::time::Duration;

use console::Vm;
use place::Place;
use xtask::session::Turn;

const PROMPT: &str = "root@debian-work:~# ";
/// How long a boot, and any one of the short programs, may take while other tests run.
const STEP: Duration = Duration::from_secs(480);
/// How long one of Python's test modules may take.
const LONG: Duration = Duration::from_secs(3600);
/// Printed when everything before it has succeeded.
const SUCCESS: &str = "all is well";

/// Boots and logs in.
fn start(place: &Place, vcpus: u32) -> Vm {
    let mut vm = place.start(&format!(
        "run debian-work --engine soft -m 1G -c {vcpus} --ephemeral"
    ));
    vm.expect(" login: ", STEP);
    vm.send("root\n");
    vm.expect(PROMPT, STEP);
    vm
}

/// Runs a command that must succeed.
fn check(vm: &mut Vm, command: &str, timeout: Duration) {
    // The marker is put together in the guest, so that the echo of the line is not taken for it.
    let line = format!("{{ {command}; }} && echo all is \"\"well");
    let output = vm.shell(PROMPT, &line, timeout);
    assert!(output.contains(SUCCESS), "{command}:\n{output}");
}

fn finish(mut vm: Vm) {
    vm.send("poweroff\n");
    assert_eq!(vm.wait(STEP).code(), Some(0), "{}", vm.transcript());
}

/// Text to compress, and the compressors' round trips.
fn round_trips(kilobytes: u32) -> String {
    format!(
        "head -c {kilobytes}k /dev/urandom | base64 > f && for z in gzip xz zstd; do \
         $z -k -q f -c > f.z && $z -dc f.z | cmp - f || break; done"
    )
}

/// Floating point and recursion, compiled in the guest; the sum is (π - 1) / 2 in the limit.
const PROGRAM: &str = "printf '#include <stdio.h>\\n#include <math.h>\\nint f(int n)\
    {return n<2?n:f(n-1)+f(n-2);}int main(){double s=0;for(int i=1;i<100000;i++)s+=sin(i)/i;\
    printf(\"%%.9f %%d\\\\n\",s,f(22));return 0;}' > a.c && gcc -O2 a.c -o a -lm && \
    test \"$(./a)\" = '1.070805295 17711'";

fn database(rows: u32) -> String {
    format!(
        "rm -f t.db && sqlite3 t.db 'create table t(a,b); with recursive c(x) as (select 1 union all \
         select x+1 from c where x<{rows}) insert into t select x, hex(randomblob(20)) from c; \
         create index i on t(b); pragma integrity_check; select count(*) from t;' | \
         tr '\\n' ' ' | grep -q 'ok {rows} '"
    )
}

/// Digests that are known, and a signature.
const CRYPTOGRAPHY: &str = "echo -n abc | openssl dgst -sha256 | \
    grep -q ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad && \
    openssl ecparam -name prime256v1 -genkey -noout -out k && echo text > m && \
    openssl dgst -sha256 -sign k -out s m && \
    openssl ec -in k -pubout -out p 2>/dev/null && \
    openssl dgst -sha256 -verify p -signature s m";

#[test]
fn programs_give_their_known_results() {
    let place = Place::new();
    place.add(&images::debian_with_work());
    let _turn = Turn::exclusive().unwrap();
    let mut vm = start(&place, 2);
    for command in [
        &round_trips(30),
        PROGRAM,
        &database(300),
        CRYPTOGRAPHY,
        "python3 -m test test_float",
    ] {
        check(&mut vm, command, STEP);
    }
    finish(vm);
}

#[test]
#[ignore = "takes most of an hour; `make test-deep` runs it"]
fn longer_programs_give_their_known_results() {
    let place = Place::new();
    place.add(&images::debian_with_work());
    let _turn = Turn::exclusive().unwrap();
    let mut vm = start(&place, 2);
    for command in [
        &round_trips(4096),
        &database(50_000),
        "openssl speed -seconds 1 sha256 sha512 aes-256-cbc rsa2048 ecdsap256",
    ] {
        check(&mut vm, command, LONG);
    }
    for module in [
        "test_int",
        "test_long",
        "test_math",
        "test_float",
        "test_decimal",
        "test_struct",
        "test_re",
        "test_json",
        "test_hashlib",
        "test_threading",
        "test_subprocess",
    ] {
        check(&mut vm, &format!("python3 -m test {module}"), LONG);
    }
    finish(vm);
}
