# Before any GPU-hour is spent: can all ranks reach each other, are the paths there, is there room on the disk?
[ -n "$asked" ] || run 0 "$python" @{preflight_entry} --config @{config} --min-free-gib @{min_free_gib}
status=$?
if [ -n "$asked" ]; then
    again "asked to stop before training began"
elif [ "$status" -eq 2 ]; then
    end "the preflight refuses this run: see $logs" 2
elif [ "$status" -ne 0 ]; then
    again_after_false_start "the preflight failed"
fi
