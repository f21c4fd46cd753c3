"""What travels between server and sites: the only names a message may hold.

    train      down  arrays    adapter tensors the site cannot derive itself
                     config    server-round, adapter-digest, model-digest, counted-steps, directive, exchange, own (digest of
                               the site's last reply that was merged, where slots stay at the site)
                     memory    a virtual site's memory of its filter, if the filter keeps one, and the slots that stay with it
               up    arrays    what the method's travel and transport make of the adapter, or of one step's noised gradients
                     counters  steps, epsilon, noise-multiplier, sample-rate, seeded
                     memory    as above, from virtual sites only
    evaluate   down  arrays    adapter tensors the site cannot derive itself
                     config    server-round, model-digest, own
                     memory    as above, to virtual sites only, where slots stay with them
               up    site-metrics  accuracy and noise-multiplier, of the noise that the site's ledger counts; in a simulation
                                   exact accuracy and loss, a leak (only with evaluate-sites)
    identity   up    identity  site, sites (-1 outside of a simulation)
                     profile   words, if the site's owner tells any
                     sharing   name and declared records, from a site that can take part in secure sums

An order names no choice of the method: the site takes them from the run's settings, which its owner's caps have passed.
Counters are public: they follow from public constants and from how often the site was asked. Nothing that depends on
the records travels but the tensors, and those only after clipping and noise, unless a run evaluates on the sites.
What a reply says is checked for form here, and against what the server itself knows in `lalora_flwr.server.counts`.
"""
